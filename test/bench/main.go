package main

import (
	_ "github.com/tailsplice/tailsplice/test/netns/lab"
)

func main() {}
