package sockmap

import "github.com/tailsplice/tailsplice/loader/loadertest"

// What tests use all the time.
type (
	path        = loadertest.Path
	pathOptions = loadertest.PathOptions
	result      = loadertest.Result
)

const patience = loadertest.Patience

var (
	bothWays      = loadertest.BothWays
	connect       = loadertest.Connect
	exchangeBytes = loadertest.ExchangeBytes
	inOwnNetwork  = loadertest.InOwnNetwork
	must          = loadertest.Must
	networks      = loadertest.Networks
	send          = loadertest.Send
	sendPart      = loadertest.SendPart
	splicePath    = loadertest.SplicePath
	trySplice     = loadertest.TrySplice
	waitFor       = loadertest.WaitFor
)
