# make run | test | test-unit | bench | lint | audit | install PREFIX=DIR | fuzz
#
# `make` without a target lists the targets.

CARGO ?= cargo
PREFIX ?= /usr/local
# Prepended to the paths of `make install`, for packages.
DESTDIR ?=
DEST = $(DESTDIR)$(PREFIX)
PROGRAMS = tidegate docker-proxy slirp4netns
# Where `make build` puts the programs.
RELEASE ?= $(or $(CARGO_TARGET_DIR),target)/release
# The port that `make run` publishes.
RUN_PORT ?= 8080
BENCH_ARGS ?=
FUZZ_SECONDS ?= 60
# The client of etcd, which `tidegate mesh` needs, takes protoc to build.
ETCD = $$(scripts/has-protoc && echo --features etcd)
FUZZ_TARGETS = $(notdir $(basename $(wildcard fuzz/fuzz_targets/*.rs)))

.PHONY: help build run mesh test test-unit bench bench-quick lint audit install fuzz clean

help:
	@echo "make run      build, and bring up examples/hello, published at port $(RUN_PORT)"
	@echo "make mesh     build, and show a cluster of three hosts on this machine (root, etcd, python3)"
	@echo "make test     install what the tests need (as root, with apt) and run them all"
	@echo "make test-unit  the unit tests alone: no root, under a minute after the build"
	@echo "make bench    compare with the peers installed here; results in benches/results/"
	@echo "make lint     formatting, columns, clippy, documentation, licences and sources of dependencies"
	@echo "make audit    advisories about dependencies (needs cargo-deny and its database)"
	@echo "make install  PREFIX=DIR: tidegate, docker-proxy, slirp4netns, systemd units, manual pages, completion (default /usr/local); DESTDIR=DIR for packages"
	@echo "make fuzz     each fuzz target for FUZZ_SECONDS=$(FUZZ_SECONDS) (needs cargo-fuzz and a nightly)"

build:
	@[ -n "$(ETCD)" ] || echo "note: protoc or its libraries are missing: building without tidegate mesh (Debian: apt install protobuf-compiler libprotobuf-dev)" >&2
	$(CARGO) build --release --locked $(ETCD)

run: build
	@echo "open http://localhost:$(RUN_PORT)   (metrics: http://127.0.0.1:9464/metrics; Ctrl-C ends it)"
	@# The example runs `tidegate` from PATH. Without /run or XDG_RUNTIME_DIR, the run directory is
	@# below target/.
	@[ -w /run ] || [ -n "$$XDG_RUNTIME_DIR" ] || export TIDEGATE_RUN_DIR="$${TIDEGATE_RUN_DIR:-$(CURDIR)/target/run}"; \
	PATH="$(CURDIR)/target/release:$$PATH" RUN_PORT=$(RUN_PORT) exec tidegate up -f examples/hello/compose.yaml

# Three hosts, a service and a client, in network namespaces (examples/mesh/README.md).
mesh: build
	@PATH="$(CURDIR)/target/release:$$PATH" exec examples/mesh/run $(MESH_ARGS)

# The test command of the README. The tests need root for namespaces, dockerd and the programs of
# scripts/test-deps.
test:
	@scripts/test-deps
	@[ -n "$(ETCD)" ] || { echo "WARNING: without protoc, the tests of tidegate mesh are left out" >&2; [ -z "$$CI" ]; }
	$(CARGO) test --locked --workspace --no-fail-fast $(ETCD)

# Unit tests that need neither root nor namespaces. The skipped tests of netsetup, nat and netfilter
# create namespaces or load BPF programs.
test-unit:
	$(CARGO) test --locked --workspace --lib --bins --no-fail-fast -- \
	  --skip setup::tests --skip io::destinations --skip io::sockets --skip guard::tests::ebpf

bench:
	@scripts/test-deps
	$(CARGO) build --release --locked $(ETCD)
	$(CARGO) bench --locked --bench compare -- --out benches/results $(BENCH_ARGS)
	$(CARGO) bench --locked -p tidegate-dns --bench dnsperf
	$(CARGO) bench --locked -p tidegate-netfilter --bench port_guard
	$(CARGO) bench --locked -p tidegate-mesh --features etcd --bench overlay
	$(CARGO) bench --locked --features etcd --bench mesh

# Checks in a few minutes that the benchmarks run. The figures are not meaningful, so the programs are
# built without link-time optimization, which would take most of the time.
bench-quick: export CARGO_PROFILE_RELEASE_LTO = off
bench-quick: export CARGO_PROFILE_RELEASE_CODEGEN_UNITS = 16
bench-quick:
	@scripts/test-deps
	$(CARGO) build --release --locked
	$(CARGO) bench --locked --bench compare -- --quick $(BENCH_ARGS)

lint:
	$(CARGO) fmt --all --check
	scripts/check-columns
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings
	@if [ -n "$(ETCD)" ]; then \
	   $(CARGO) clippy --locked -p tidegate -p tidegate-mesh $(ETCD) --all-targets -- -D warnings; \
	 elif [ -n "$$CI" ]; then echo "protoc or its libraries are missing" >&2; exit 1; \
	 else echo "note: protoc is not installed; the client of etcd was not checked"; fi
	RUSTDOCFLAGS="-D warnings -A rustdoc::private-intra-doc-links" $(CARGO) doc --locked --workspace --no-deps --quiet
	@if command -v cargo-deny >/dev/null; then $(CARGO) deny --locked check bans licenses sources; \
	 elif [ -n "$$CI" ]; then echo "cargo-deny is missing" >&2; exit 1; \
	 else echo "note: cargo-deny is not installed; licences and sources were not checked"; fi

# Needs access to the advisory database. The other checks of cargo-deny are part of `lint`.
audit:
	@command -v cargo-deny >/dev/null || { echo "make audit needs cargo-deny: cargo install --locked cargo-deny" >&2; exit 1; }
	$(CARGO) deny --locked check advisories

# Does not build, so that `sudo make install` after `make build` runs no compiler as root. Programs
# that are missing are built.
install: $(addprefix $(RELEASE)/,$(PROGRAMS))
	@newer=$$(find . -name target -prune -o -name '*.rs' -newer $(RELEASE)/tidegate -print -quit); \
	[ -z "$$newer" ] || echo "note: $$newer is newer than $(RELEASE)/tidegate; run make build to include it" >&2
	install -d "$(DEST)/bin" "$(DEST)/share/man/man1" "$(DEST)/share/bash-completion/completions" \
	  "$(DEST)/share/zsh/site-functions" "$(DEST)/share/fish/vendor_completions.d" \
	  "$(DEST)/lib/systemd/system" "$(DEST)/lib/systemd/user" "$(DEST)/share/tidegate"
	install -m 755 $^ "$(DEST)/bin/"
	$(RELEASE)/tidegate man "$(DEST)/share/man/man1"
	$(RELEASE)/tidegate completion bash > "$(DEST)/share/bash-completion/completions/tidegate"
	$(RELEASE)/tidegate completion zsh > "$(DEST)/share/zsh/site-functions/_tidegate"
	$(RELEASE)/tidegate completion fish > "$(DEST)/share/fish/vendor_completions.d/tidegate.fish"
	install -m 644 packaging/systemd/tidegate.service packaging/systemd/tidegate.socket "$(DEST)/lib/systemd/system/"
	install -m 644 packaging/systemd/user/tidegate.service packaging/systemd/user/tidegate.socket "$(DEST)/lib/systemd/user/"
	install -m 644 packaging/systemd/projects.conf "$(DEST)/share/tidegate/"
	@# Units name programs by absolute path, and DESTDIR is not part of it.
	sed -i 's|/usr/bin/tidegate|$(abspath $(PREFIX))/bin/tidegate|' \
	  "$(DEST)/lib/systemd/system/tidegate.service" "$(DEST)/lib/systemd/user/tidegate.service"

$(addprefix $(RELEASE)/,$(PROGRAMS)):
	$(MAKE) build

fuzz:
	@command -v cargo-fuzz >/dev/null || { echo "make fuzz needs cargo-fuzz: cargo install cargo-fuzz" >&2; exit 1; }
	@for target in $(FUZZ_TARGETS); do \
	  $(CARGO) +nightly fuzz run $$target -- -max_total_time=$(FUZZ_SECONDS) || exit 1; done

clean:
	$(CARGO) clean
