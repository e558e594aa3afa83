// Package cgroup puts sockets of tests into cgroups of their own. It is for tests only.
package cgroup
