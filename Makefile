# make run | test | test-unit | bench | lint | audit | install PREFIX=DIR | fuzz
#
# `make` without a target lists the targets.

CARGO ?= cargo
PREFIX ?= /usr/local
# The port that `make run` publishes.
RUN_PORT ?= 8080
BENCH_ARGS ?=
FUZZ_SECONDS ?= 60
FUZZ_TARGETS = $(notdir $(basename $(wildcard fuzz/fuzz_targets/*.rs)))

.PHONY: help build run test test-unit bench bench-quick lint audit install fuzz clean

help:
	@echo "make run      build, and bring up examples/hello, published at port $(RUN_PORT)"
	@echo "make test     install what the tests need (as root, with apt) and run them all"
	@echo "make test-unit  the unit tests alone: no root, under a minute after the build"
	@echo "make bench    compare with the peers installed here; results in benches/results/"
	@echo "make lint     formatting, columns, clippy, documentation, licences and sources of dependencies"
	@echo "make audit    advisories about dependencies (needs cargo-deny and its database)"
	@echo "make install  PREFIX=DIR: tidegate, docker-proxy, slirp4netns, manual pages, completion (default /usr/local)"
	@echo "make fuzz     each fuzz target for FUZZ_SECONDS=$(FUZZ_SECONDS) (needs cargo-fuzz and a nightly)"

build:
	$(CARGO) build --release --locked

run: build
	@echo "open http://localhost:$(RUN_PORT)   (metrics: http://127.0.0.1:9464/metrics; Ctrl-C ends it)"
	@# The example runs `tidegate` from PATH. Without /run or XDG_RUNTIME_DIR, the run directory is
	@# below target/.
	@[ -w /run ] || [ -n "$$XDG_RUNTIME_DIR" ] || export TIDEGATE_RUN_DIR="$${TIDEGATE_RUN_DIR:-$(CURDIR)/target/run}"; \
	PATH="$(CURDIR)/target/release:$$PATH" RUN_PORT=$(RUN_PORT) exec tidegate up -f examples/hello/compose.yaml

# The test command of the README. The tests need root for namespaces, dockerd and the programs of
# scripts/test-deps.
test:
	@scripts/test-deps
	$(CARGO) test --locked --workspace --no-fail-fast

# Unit tests that need neither root nor namespaces. The skipped tests of netsetup, nat and netfilter
# create namespaces or load BPF programs.
test-unit:
	$(CARGO) test --locked --workspace --lib --bins --no-fail-fast -- \
	  --skip setup::tests --skip io::destinations --skip io::sockets --skip guard::tests::ebpf

bench:
	@scripts/test-deps
	$(CARGO) build --release --locked
	$(CARGO) bench --locked --bench compare -- --out benches/results $(BENCH_ARGS)
	$(CARGO) bench --locked -p tidegate-dns --bench dnsperf
	$(CARGO) bench --locked -p tidegate-netfilter --bench port_guard

# Checks in a few minutes that the benchmarks run. The figures are not meaningful.
bench-quick:
	@scripts/test-deps
	$(CARGO) build --release --locked
	$(CARGO) bench --locked --bench compare -- --quick $(BENCH_ARGS)

lint:
	$(CARGO) fmt --all --check
	scripts/check-columns
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings -A rustdoc::private-intra-doc-links" $(CARGO) doc --locked --workspace --no-deps --quiet
	@if command -v cargo-deny >/dev/null; then $(CARGO) deny --locked check bans licenses sources; \
	 elif [ -n "$$CI" ]; then echo "cargo-deny is missing" >&2; exit 1; \
	 else echo "note: cargo-deny is not installed; licences and sources were not checked"; fi

# Needs access to the advisory database. The other checks of cargo-deny are part of `lint`.
audit:
	@command -v cargo-deny >/dev/null || { echo "make audit needs cargo-deny: cargo install --locked cargo-deny" >&2; exit 1; }
	$(CARGO) deny --locked check advisories

install: build
	install -d "$(PREFIX)/bin" "$(PREFIX)/share/man/man1" "$(PREFIX)/share/bash-completion/completions" \
	  "$(PREFIX)/share/zsh/site-functions" "$(PREFIX)/share/fish/vendor_completions.d"
	install -m 755 target/release/tidegate target/release/docker-proxy target/release/slirp4netns "$(PREFIX)/bin/"
	target/release/tidegate man "$(PREFIX)/share/man/man1"
	target/release/tidegate completion bash > "$(PREFIX)/share/bash-completion/completions/tidegate"
	target/release/tidegate completion zsh > "$(PREFIX)/share/zsh/site-functions/_tidegate"
	target/release/tidegate completion fish > "$(PREFIX)/share/fish/vendor_completions.d/tidegate.fish"

fuzz:
	@command -v cargo-fuzz >/dev/null || { echo "make fuzz needs cargo-fuzz: cargo install cargo-fuzz" >&2; exit 1; }
	@for target in $(FUZZ_TARGETS); do \
	  $(CARGO) +nightly fuzz run $$target -- -max_total_time=$(FUZZ_SECONDS) || exit 1; done

clean:
	$(CARGO) clean
