package loader

import "github.com/tailsplice/tailsplice/loader/loadertest"

// What tests use all the time.
type (
	pathOptions = loadertest.PathOptions
)

var (
	bothWays      = loadertest.BothWays
	exchangeBytes = loadertest.ExchangeBytes
	must          = loadertest.Must
	networks      = loadertest.Networks
	splicePath    = loadertest.SplicePath
	waitFor       = loadertest.WaitFor
)
