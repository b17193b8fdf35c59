#!/bin/sh
# What an instance runs whose workload is written in Python: an init that knows nothing of kmorph.
/bin/mount -t proc proc /proc
/bin/mount -t sysfs sys /sys
/usr/bin/python3 -I -S /counter.py >/dev/kmsg 2>&1 &
while :; do /bin/sleep 3600; done
