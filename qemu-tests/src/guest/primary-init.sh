#!/bin/sh
# PID 1 of the primary kernel in the scenarios: kmorph's modules, then the scenario.
/bin/mount -t proc proc /proc
/bin/mount -t sysfs sys /sys
/bin/mount -t devtmpfs dev /dev
/bin/mount -t tmpfs tmpfs /run
/bin/mount -t debugfs debugfs /sys/kernel/debug
/bin/busybox ifconfig lo up
export PATH=/bin:/usr/bin:/usr/sbin
exec </dev/console >/dev/console 2>&1
modules=/lib/modules/$(/bin/busybox uname -r)
for m in kernel/net/vmw_vsock/vsock extra/kmorph extra/kerf-vsock; do
	insmod "$modules/$m.ko" || echo "KMORPH-RESULT failed: insmod $m"
done
scenario=$(grep -o 'kmorph.scenario=[^ ]*' /proc/cmdline)
kmorph-qemu guest "${scenario#*=}" || echo "KMORPH-RESULT failed: the scenario program ended with $?"
exec /bin/busybox poweroff -f
