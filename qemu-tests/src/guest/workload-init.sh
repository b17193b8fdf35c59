#!/bin/sh
# What an instance runs in the scenarios: an init that knows nothing of kmorph.
/bin/mount -t proc proc /proc
/bin/mount -t sysfs sys /sys
echo "workload: $(/bin/busybox uname -r) on $(/bin/busybox nproc) CPUs" >/dev/kmsg
/vsock_check serve 7002 >/dev/kmsg 2>&1 &
/kmorph-qemu tool >/dev/kmsg 2>&1 &
while :; do /bin/sleep 3600; done
