// Package auth finds out who makes an HTTP request: by a user and a password
// ([Users]), or by asking another server ([Forward]).
//
// Its files:
//
//	auth.go     this comment
//	users.go    users and hashes of passwords
//	turns.go    who may have a password checked next, since a check takes long
//	forward.go  another server is asked
package auth
