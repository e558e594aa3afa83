package admin

import (
	"testing"

	"github.com/tailsplice/tailsplice/test/reference"
)

func TestFormatVersion(t *testing.T) { reference.CompareFormat(t, formatVersion) }
