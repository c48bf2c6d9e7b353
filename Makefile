# make example ARGS="--recipe both" is ./dev example --recipe both
.PHONY: example test bench lint
example test bench lint:
	@./dev $@ $(ARGS)
