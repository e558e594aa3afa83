//go:build !linux

package front

import "context"

// followInterfaces does nothing here: a reload looks at the interfaces again.
func (f *Front) followInterfaces(context.Context) {}
