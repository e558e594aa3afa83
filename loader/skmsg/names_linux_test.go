package skmsg

import "github.com/tailsplice/tailsplice/loader/loadertest"

// What tests use all the time.
type (
	path = loadertest.Path
)

const patience = loadertest.Patience

var (
	connect       = loadertest.Connect
	exchangeBytes = loadertest.ExchangeBytes
	must          = loadertest.Must
	networks      = loadertest.Networks
	waitFor       = loadertest.WaitFor
)
