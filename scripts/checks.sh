#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# checks.sh - rules of this repository that no compiler knows: file lengths,
# ignored tests, unfinished marks, and the form of the kernel sources.
set -euo pipefail
. "$(dirname "$0")/common.sh"
cd "$KMORPH_ROOT"
bad=0
report() { printf '%s\n' "$*" >&2; bad=1; }

while read -r lines file; do
	[ "$file" = total ] || [ "$lines" -le 800 ] || report "$file: $lines lines; 800 are the limit"
done < <(git ls-files '*.rs' '*.c' '*.h' '*.S' | xargs wc -l)

while read -r hit; do report "unfinished or ignored: $hit"; done < <(
	git grep -nE 'todo!\(|unimplemented!\(|#\[ignore|FIXME|XXX:' -- '*.rs' '*.c' '*.h' '*.S' || true)

while read -r file; do
	head -n 2 "$file" | grep -q 'SPDX-License-Identifier: GPL-2.0' || report "$file: no GPL-2.0 SPDX line"
	! grep -nE '[[:space:]]+$' "$file" /dev/null || report "$file: blanks at the end of a line"
	! grep -nE '^ +[^ *]' "$file" /dev/null || report "$file: indented with blanks; kernel code is indented with tabs"
	# Tabs count as eight columns, as in the kernel.
	while read -r hit; do report "$file: longer than 100 columns: $hit"; done < <(
		expand -t 8 "$file" | awk 'length > 100 {print NR}')
done < <(git ls-files 'kmod/*.c' 'kmod/*.h' 'kmod/*.S' 'qemu-tests/*.c')

# A kernel with one CPU patches the lock prefix out of these, and then they are not atomic for another kernel.
while read -r hit; do report "not atomic between kernels, use sync_...(): $hit"; done < <(
	git grep -nE '(^|[^_a-z])(test_and_)?(set|clear|change)_bit\(|cmpxchg\(' -- 'kmod/*.c' 'kmod/*.h' || true)

# Where there is systemd, it reads the unit. The program it names need not be installed here.
if command -v systemd-analyze >/dev/null; then
	unit=$(mktemp -d)
	sed 's|^ExecStart=.*|ExecStart=/bin/true|' packaging/systemd/kmorphd.service >"$unit/kmorphd.service"
	said=$(systemd-analyze verify "$unit/kmorphd.service" 2>&1) || report "packaging/systemd/kmorphd.service: $said"
	rm -r "$unit"
fi

exit $bad
