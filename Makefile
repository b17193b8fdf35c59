# SPDX-License-Identifier: Apache-2.0
#
# make demo   two real kernels run, crash, hang and are healed, on one QEMU machine (without root: stand-ins)
# make test   everything: formatting, lints, unit and property tests, the QEMU scenarios
# make soak   ten thousand seeds of the simulated supervisor
# make bench  every number of SPECIFICATION.md, measured, beside its promise
#
# KMORPH_BUILD moves build/ elsewhere, KMORPH_QEMU_ACCEL=kvm|tcg skips the probe.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
all: modules binaries generated

QEMU := build/static/x86_64-unknown-linux-gnu/release/kmorph-qemu

# Manual pages and completions for packages, in build/.
generated:
	cargo run --locked -q -p kmorphctl -- generate man build/man
	cargo run --locked -q -p kmorphctl -- generate completions build/completions

.PHONY: all deny generated demo demo-processes soak test bench scenarios unit lint setup kernels modules binaries clean


# Real kernels for root; stand-ins for others, who can neither install packages nor need to.
ifeq ($(shell id -u),0)
demo: modules binaries
	@$(QEMU) demo
else
demo: demo-processes
endif

# The same story on stand-ins.
demo-processes:
	@scripts/demo-processes.sh

test: lint unit scenarios

bench: modules binaries
	@scripts/setup.sh bench
	cargo bench --locked -p kmp --bench heartbeat
	cargo build --locked --release -p kmorph-bench -p kmorph-agent
	target/release/kmorph-bench all
	cargo test --locked --release -p kmorph-actors --lib sim::load -- --nocapture | grep -E "hangs|load|result"
	@$(QEMU) bench

scenarios: modules binaries
	@$(QEMU) run

unit: setup
	cargo test --locked --workspace
	scripts/demo-processes.sh >/dev/null

lint: setup
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings
	scripts/checks.sh

# The supervisor's simulation, seed after seed.
soak: setup
	KMORPH_SIM_SEEDS=10000 cargo test --locked --release -p kmorph-actors --lib simulation

# Licences and sources of what is depended on; installs the tool when it is missing (some minutes).
deny:
	@command -v cargo-deny >/dev/null || cargo install --locked cargo-deny
	cargo deny --locked check bans licenses sources

setup:
	@scripts/setup.sh

kernels: setup
	@scripts/kernels.sh

modules: kernels
	@scripts/build-modules.sh

binaries: setup
	@scripts/static.sh

clean:
	rm -rf build/qemu build/modules build/static target
