package config

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// setVariables sets what the cases about variables use.
func setVariables(t *testing.T) {
	for name, value := range map[string]string{"REGION": "waw", "EMPTY": "", "COUNT": "12", "FLAG": "true",
		"NODE": "home", "ADDR": "192.0.2.1", "SECRET": "tskey-auth-k9", "YAML": "x, reject: true }",
		"LINES": "a\nb", "LATIN": "caf\xe9", "NESTED": "${REGION}"} {
		t.Setenv(name, value)
	}
}

func TestVariables(t *testing.T) {
	setVariables(t)
	c, err := Parse("edge.yaml", []byte(`# ${UNSET} in a comment is none
node: edge-${REGION:-lab}
datapath: ${DATAPATH:-auto}
listeners:
  - name: "${EMPTY:-web}"
    listen: ["${ADDR}:443", "${UNSET:-127.0.0.1}:${PORT:-8443}"]
    mode: http
    accept_proxy: { from: ["tag:${ROLE:-edge}"], required: "${FLAG}" }
    routes:
      - host: [example.org]
        headers: { X-One: "$${REGION} $5 $$ ${NESTED} ${EMPTY}|", X-Two: "${YAML}" }
        forward: "tailnet://${NODE}:80"
    default: { forward: "127.0.0.1:${COUNT}" }
limits: { connections: "${COUNT}", idle_timeout: "${COUNT}m", flow_buffer: "${MANY:-4096}" }
control: { socket: "/run/${EMPTY}/s.sock" }
`))
	if err != nil {
		t.Fatal(err)
	}
	l := c.Listeners[0]
	got := []any{c.Node, c.Datapath, l.Name, l.Listen, l.AcceptProxy.From, l.AcceptProxy.Required,
		l.Routes[0].Headers, l.Routes[0].Target().String(), l.Default.Target().String(),
		c.Limits.Connections, c.Limits.IdleTimeout, c.Limits.FlowBuffer, c.Control.Socket}
	want := []any{"edge-waw", "auto", "web", []string{"192.0.2.1:443", "127.0.0.1:8443"}, []string{"tag:edge"}, true,
		// What a variable holds is one value: it is not read as YAML, nor for variables.
		map[string]string{"X-One": "${REGION} $5 $$ ${REGION} |", "X-Two": "x, reject: true }"},
		"tailnet://home:80", "127.0.0.1:12", 12, 12 * time.Minute, int64(4096), "/run//s.sock"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// TestVariablesNotShown: a message may show what is written, and never what a variable holds.
func TestVariablesNotShown(t *testing.T) {
	setVariables(t)
	for _, value := range []string{`node: "${SECRET}/"`, `limits: { connections: "${SECRET}" }`,
		`limits: { idle_timeout: "${SECRET}" }`, `datapath: "${SECRET}"`, `listeners: "${SECRET}"`,
		`access_log: { file: "~${SECRET}" }`, `control: { metrics: "${SECRET}" }`, `limits: "${SECRET}"`, `node: ["${SECRET}"]`, `${SECRET}: x`,
		`listeners: [{ listen: ["${SECRET}/", "${SECRET}:x", "tailnet://${SECRET}"], mode: "${SECRET}", default: "${SECRET}" }]`,
		`listeners: [{ listen: ":1", mode: sni, default: { forward: "${SECRET}" } }]`,
		`listeners: [{ listen: ":1", mode: sni, accept_proxy: { from: ["${SECRET}", "${SECRET}"] }, default: { forward: "a:1" } }]`,
		`listeners: [{ listen: ":1", mode: tcp, default: { forward: "https://u:${SECRET}@h:1" } }]`} {
		_, err := Parse("edge.yaml", []byte(value))
		if err == nil {
			t.Errorf("%s: accepted", value)
		} else if strings.Contains(err.Error(), "tskey") || strings.Contains(err.Error(), "k9") {
			t.Errorf("%s: %v", value, err)
		}
	}
}

// TestVariablesInSchema: an editor that knows the schema takes a variable for any value.
func TestVariablesInSchema(t *testing.T) {
	setVariables(t)
	const file = `
node: ${NODE}
datapath: ${DATAPATH:-auto}
listeners:
  - listen: ["${ADDR}:${PORT:-443}", "${ADDR}"]
    mode: ${MODE:-http}
    accept_proxy: { from: "${FROM}", required: "${FLAG}" }
    routes: [{ host: ["${NAME}"], methods: "${METHOD}", forward: [{ to: "${TO}", weight: "${COUNT}" }] }]
limits: { connections: "${COUNT}", idle_timeout: "${COUNT}m", flow_buffer: "${MANY:-4096}" }
`
	if err := compileSchema(t).Validate(plain(t, []byte(file))); err != nil {
		t.Errorf("the schema refuses it: %v", err)
	}
}
