// Package passage holds what clients and targets send each other against what
// arrives at the other side of a route that guards nothing: every byte of it, but
// for the changes that docs/http.md names. nginx does the same beside it.
package passage
