# tailsplice: `make help` lists what there is.

SHELL       := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PREFIX      ?= /usr/local
DESTDIR     ?=
BUILD       := build
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2
# It checks that a field which says so (+checklocks:mu) is used with that lock held, in these packages.
CHECKLOCKS  := gvisor.dev/gvisor/tools/checklocks/cmd/checklocks@v0.0.0-20260905035102-160fafc42237
LOCKS       := ./loader/skmsg ./loader/sockmap ./userspace/accesslog ./userspace/acme ./userspace/admin ./userspace/announce \
               ./userspace/auth ./userspace/container ./userspace/datapath ./userspace/dial ./userspace/flow \
               ./userspace/handover ./userspace/health ./userspace/server ./userspace/limit ./userspace/logwriter ./userspace/loop ./userspace/relay \
               ./userspace/tailnet ./userspace/tlsterm ./userspace/vhost
VERSION     := $(shell git describe --tags --always --dirty --abbrev=12 2>/dev/null || echo devel)
# What people install is made by a module of its own, too.
PACKAGES    := deploy/packages
FLY         := deploy/fly
STATIC      := CGO_ENABLED=0 GOOS=linux GOARCH=amd64
# The lab has a module of its own, so that its heavy imports stay out of ours.
LAB         := test/netns
# So has the benchmark: see `make bench`.
BENCHDIR    := test/bench
# Comments of over 110 columns, a tab being 4, but for tests; with those still to be broken left out.
wider        = LC_ALL=C awk -v re='$(1)' '{ l = $$0; gsub(/\t/, "    ", l); gsub(/[\200-\277]/, "", l) } \
	length(l) > 110 && $$0 ~ re && !/\/\/go:/ { print FILENAME ":" FNR }' $$(git ls-files $(2) | grep -vE '$(3)');
WIDE         = $(shell $(call wider,(^|[ \t])//,'*.go',_test[.]go|_bpfe) $(call wider,/[*]|^ [*]|//,'bpf/*.[ch]',/include/) \
	$(call wider,(^|[ \t])#,scripts .ci,^$$))

export TESTFLAGS ?=
FUZZTIME    ?= 1m
# go.mod names the Go version; an older go fetches that one by itself.
export GOTOOLCHAIN ?= auto

.PHONY: help
help: ## Show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: provision
provision: ## Install what build, test and demo need (Debian, root; nothing to do is quick)
	@scripts/provision

.PHONY: build
build: ## Build the daemon into build/tailsplice
	@mkdir -p $(BUILD)
	CGO_ENABLED=0 go build -trimpath -ldflags "-s -w -X main.buildVersion=$(VERSION)" -o $(BUILD)/tailsplice ./cmd/tailsplice

.PHONY: test
test: provision ## Run all tests (root runs those in namespaces and on a real tailnet too)
	GOOS=darwin go build ./...
	@scripts/test unit deploy lab bench

.PHONY: test-unit
test-unit: ## Unit tests with the race detector, and the build for other systems
	GOOS=darwin go build ./...
	@scripts/test unit deploy

.PHONY: test-lab
test-lab: ## The path over a real tailnet, in network namespaces (root)
	@scripts/test lab bench

.PHONY: test-packages
test-packages: provision ## Install what make packages and make fly build, on Debian 12 and 13 and in Docker (root; not a part of test)
	@scripts/test installs

.PHONY: soak
soak: ## Hours of what make test does for a minute each (root; not a part of test)
	cd userspace/relay && go test -tags soak -run '^TestSoak$$' -parallel 96 -timeout 80m $(TESTFLAGS)
	go test -tags soak -run '^TestPrograms' -p 1 -timeout 40m $(TESTFLAGS) ./userspace/relay ./test/datapath
	go test -tags soak -run '^TestIdentity' -timeout 60m $(TESTFLAGS) ./userspace/server
	cd test/oracle && go test -tags soak -run '^TestGuards$$' -timeout 3h $(TESTFLAGS)
	cd cmd/tailsplice && go test -tags soak -run '^TestStrangers$$' -timeout 40m -count=1 -v $(TESTFLAGS)
	cd test/netns && go test -tags soak -run '^TestNeverDown$$' -timeout 40m -count=1 -v $(TESTFLAGS) ./unit

# Go would take up to a minute to make each input shorter that finds something, and find nothing else then.
.PHONY: fuzz
fuzz: ## Fuzz what reads bytes of others, FUZZTIME for each target (not a part of test)
	@git grep -oE '^func Fuzz\w+' -- '*_test.go' | sed -E 's|(.*)/[^/]*:func (.*)|\1 \2|' | while read -r dir target; do \
		echo "$$dir $$target:"; \
		go test ./$$dir -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 10x </dev/null; \
	done

.PHONY: test-kernels
test-kernels: ## The loader's tests and the table on Debian's 6.1 and 6.12, in QEMU (root, amd64; not a part of test; a quarter of an hour each)
	@scripts/test-kernels

.PHONY: test-memory
test-memory: ## The daemon as an edge of 256 MB that strangers mean harm, in QEMU (root, amd64; not a part of test; 9 minutes)
	@scripts/test-memory

.PHONY: demo first
demo: first provision build ## Show the whole path at work; KEEP=1 leaves it up
	cd $(LAB) && CGO_ENABLED=0 go build -trimpath -o ../../$(BUILD)/demo ./demo
	KEEP=$(KEEP) $(BUILD)/demo

.PHONY: pictures
pictures: build ## Draw the README's picture from the demo's world, and into build/pictures what else people look at (root)
	@scripts/provision aha cmark-gfm pngquant tmux
	cd $(LAB) && CGO_ENABLED=0 go build -trimpath -o ../../$(BUILD)/demo ./demo
	$(BUILD)/demo pictures docs

first:
	@[ -e $(BUILD)/demo ] || echo "The first run installs what is missing, and builds the daemon and a tailscaled: 3 minutes on 2 processors. Later ones take 15 seconds."

.PHONY: bench
bench: provision build ## Compare with what others would use (root); BENCH=quick takes 3 minutes, the whole 20
	@BENCH=$(or $(BENCH),full) scripts/provision-bench
	cd $(BENCHDIR) && CGO_ENABLED=0 go build -o ../../$(BUILD)/bench . && CGO_ENABLED=0 go build -o ../../$(BUILD)/bench-goproxy ./peers/goproxy
	$(BUILD)/bench run --mode $(or $(BENCH),full) --out $(BUILD)

.PHONY: bench-docs
bench-docs: ## Show the run of test/bench/recorded.json, a copy of build/bench.json, in README and docs
	cd $(BENCHDIR) && CGO_ENABLED=0 go build -o ../../$(BUILD)/bench .
	$(BUILD)/bench publish

.PHONY: lint
lint: ## gofmt, vet and staticcheck, for Linux and macOS, and who holds which lock
	@unformatted=$$(git ls-files '*.go' | xargs gofmt -l); [ -z "$$unformatted" ] || { echo "not gofmt'ed:" $$unformatted; exit 1; }
	go vet ./... && go vet -tags soak,machine ./... && GOOS=darwin go vet ./...
	go run $(STATICCHECK) ./...
	GOBIN=$(CURDIR)/$(BUILD) go install $(CHECKLOCKS)
	go vet -vettool=$(BUILD)/checklocks -inferred=false $(LOCKS)
	for m in $(LAB) $(BENCHDIR) $(PACKAGES) $(FLY); do (cd $$m && go vet ./... && go run $(STATICCHECK) ./...); done
	@[ -z "$(WIDE)" ] || { echo "comments that are wider than 110 columns:" $(WIDE); exit 1; }
	for f in scripts/* .ci/run $(PACKAGES)/{postinst,prerm,postrm}; do bash -n $$f; done

.PHONY: generate
generate: ## Generate code, schema, reference, man pages and BPF objects again
	go generate ./...

.PHONY: install
install: build ## Install into PREFIX (default /usr/local): daemon, unit, user, man pages, completion
	install -Dm755 $(BUILD)/tailsplice $(DESTDIR)$(PREFIX)/bin/tailsplice
	for s in 5 8; do install -Dm644 -t $(DESTDIR)$(PREFIX)/share/man/man$$s docs/man/*.$$s; done
	install -d $(DESTDIR)$(PREFIX)/share/bash-completion/completions $(DESTDIR)$(PREFIX)/share/zsh/site-functions $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d
	$(BUILD)/tailsplice completion bash >$(DESTDIR)$(PREFIX)/share/bash-completion/completions/tailsplice
	$(BUILD)/tailsplice completion zsh >$(DESTDIR)$(PREFIX)/share/zsh/site-functions/_tailsplice
	$(BUILD)/tailsplice completion fish >$(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/tailsplice.fish
	install -Dm644 $(PACKAGES)/sysusers.conf $(DESTDIR)$(PREFIX)/lib/sysusers.d/tailsplice.conf
	install -d $(DESTDIR)$(PREFIX)/lib/systemd/system
	sed 's#@PREFIX@#$(PREFIX)#' $(PACKAGES)/tailsplice.service >$(DESTDIR)$(PREFIX)/lib/systemd/system/tailsplice.service
	install -d -m755 $(DESTDIR)/etc/tailsplice
	[ -e $(DESTDIR)/etc/tailsplice/tailsplice.yaml ] || install -m644 cmd/tailsplice/installed.yaml $(DESTDIR)/etc/tailsplice/tailsplice.yaml
	[ -n "$(DESTDIR)" ] || ! command -v systemd-sysusers >/dev/null || systemd-sysusers $(PREFIX)/lib/sysusers.d/tailsplice.conf

.PHONY: packages
packages: ## Debian packages, static tarballs, container images and their bill of materials, into build/packages
	cd $(PACKAGES) && go run . -version '$(VERSION)' -out ../../$(BUILD)/packages

.PHONY: fly fly-files
fly: fly-files ## What deploy/fly's image is built of, for an edge on fly.io, into build/fly (docs/fly.md)
	cd $(PACKAGES) && go run . -authorities ../../$(BUILD)/fly/ca-certificates.crt
	cd $(FLY) && $(STATIC) go build -trimpath -ldflags "-s -w" -o ../../$(BUILD)/fly/edge .
	$(STATIC) go build -trimpath -ldflags "-s -w -X main.buildVersion=$(VERSION)" -o $(BUILD)/fly/tailsplice ./cmd/tailsplice
	cd $(FLY) && version=$$(go list -m -f '{{slice .Version 1}}' tailscale.com) && $(STATIC) go build -trimpath -tags ts_include_cli \
		-ldflags "-s -w -X tailscale.com/version.longStamp=$$version -X tailscale.com/version.shortStamp=$$version" \
		-o ../../$(BUILD)/fly/tailscaled tailscale.com/cmd/tailscaled

# What nobody has edited is replaced by what is here now. .copied has each file as it was copied last, without
# edits.
fly-files:
	@mkdir -p $(BUILD)/fly/.copied
	@for f in Dockerfile fly.toml edge.yaml; do \
		tree=$(FLY)/$$f theirs=$(BUILD)/fly/$$f copied=$(BUILD)/fly/.copied/$$f; \
		if [ ! -e $$theirs ] || cmp -s $$theirs $$tree || cmp -s $$theirs $$copied; then \
			cp $$tree $$theirs; cp $$tree $$copied; \
		elif cmp -s $$tree $$copied; then \
			echo "make fly: $$theirs is kept: you have edited it"; \
		else \
			was=$$copied why="you have edited it"; [ -e $$was ] || { was=$$theirs; why="$$why, or it is of an older tree"; }; \
			echo "make fly: $$theirs is kept: $$why. But $$tree has changed since:"; \
			diff -u $$was $$tree || :; \
			echo "make fly: once $$theirs has what it needs of that: cp '$(CURDIR)/$$tree' '$(CURDIR)/$$copied'"; \
		fi; \
	done

.PHONY: clean
clean: ## Remove what was built
	rm -rf $(BUILD)
