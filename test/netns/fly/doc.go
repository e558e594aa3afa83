// Package fly boots the image of deploy/fly as docs/fly.md says, with HAProxy in the place of fly.io's proxy.
package fly
