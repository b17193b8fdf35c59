#!/bin/sh
# What an instance runs in the scenarios: an init that knows nothing of kmorph.
/bin/mount -t proc proc /proc
/bin/mount -t sysfs sys /sys
/bin/mount -t devtmpfs dev /dev
echo "workload: $(/bin/busybox uname -r) on $(/bin/busybox nproc) CPUs" >/dev/kmsg
/vsock_check serve 7002 >/dev/kmsg 2>&1 &
for word in $(/bin/cat /proc/cmdline); do
	case $word in
	counter=*) /counter --port "${word#counter=}" >/dev/kmsg 2>&1 & ;;
	criu=*)
		for module in /criu/"$(/bin/busybox uname -r)"/*.ko; do
			/bin/insmod "$module" || echo "insmod $module failed" >/dev/kmsg
		done
		# criu asks what TCP can do.
		/bin/busybox ifconfig lo 127.0.0.1 up
		/bin/mount -t tmpfs run /run
		/usr/bin/kmorph-criu "${word#criu=}" /run/numbers >/dev/kmsg 2>&1 &
		;;
	journal=*) /kmorph-qemu journal "${word#journal=}" >/dev/kmsg 2>&1 & ;;
	kv=*) /kmorph-qemu kv "${word#kv=}" >/dev/kmsg 2>&1 & ;;
	esac
done
/kmorph-qemu tool >/dev/kmsg 2>&1 &
while :; do /bin/sleep 3600; done
