# demo: the main job. demo-keys: keys taken away and given back. demo-recovery: a tenant taken back, a drill, a region lost and restored. test: everything. chaos: the scenarios of ops/chaos. bench: beside etcd. bench-keys: what seals, resumptions and rotations cost. bench-recovery: what restores, the archive and drills cost. check: style and licences.
export CARGO_TARGET_DIR ?= $(HOME)/.cache/holdfast/target
CARGO = cargo --locked

# advisories: known vulnerabilities of the libraries.
.PHONY: demo demo-keys demo-recovery test chaos bench bench-keys bench-recovery check advisories build setup-build setup-test setup-browser

setup-build:
	@tools/setup build
setup-test:
	@tools/setup test
setup-browser:
	@tools/setup browser
build: setup-build
	$(CARGO) build --release --workspace
demo: build
	$(CARGO_TARGET_DIR)/release/demo
demo-keys: setup-test build
	$(CARGO_TARGET_DIR)/release/demo_keys
demo-recovery: setup-test setup-browser build
	$(CARGO_TARGET_DIR)/release/demo_recovery
test: setup-test build
	# One at a time: each starts a region of processes on a machine of two cores.
	RUST_TEST_THREADS=1 $(CARGO) test --release --workspace --no-fail-fast
bench: setup-test build
	$(CARGO_TARGET_DIR)/release/bench
	$(CARGO_TARGET_DIR)/release/bench_restore
bench-keys: setup-test build
	$(CARGO_TARGET_DIR)/release/bench_keys
bench-recovery: setup-test build
	BENCH_RESTORE_MB=2048 $(CARGO_TARGET_DIR)/release/bench_restore
	$(CARGO_TARGET_DIR)/release/bench_recovery
chaos: setup-test build
	ops/chaos/run
check: setup-build
	cargo fmt --all --check
	$(CARGO) clippy --release --workspace --all-targets -- -D warnings
	@command -v cargo-deny >/dev/null || cargo install --locked --version 0.19.0 cargo-deny
	cargo deny check bans licenses sources
# Known vulnerabilities, by the RustSec database, which lies on GitHub.
advisories:
	@command -v cargo-deny >/dev/null || cargo install --locked --version 0.19.0 cargo-deny
	cargo deny check advisories
