// Package auth finds out who makes an HTTP request: by a user and a password
// ([Users]), or by asking another server ([Forward]).
package auth
