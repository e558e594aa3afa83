package lab

// The configurations of the story. They are what a person would write, with all defaults left out.
const (
	// EdgeConfig sends everything home, and says who it is from.
	EdgeConfig = `listeners:
  - name: web
    listen: [":443"]
    mode: sni
    default: { forward: tailnet://home:443, send_proxy: v2 }
`
	// HomeConfig terminates TLS, and sends on what it can't answer. It needs [Host.InstallCertificate].
	HomeConfig = `listeners:
  - name: web
    listen: ["tailnet:443"]
    mode: https
    accept_proxy: { from: ["tag:edge"] }
    certificates:
      - { files: { cert: ` + CertFile + `, key: ` + KeyFile + ` } }
    default: { forward: tailnet://laptop:8080 }
`
	// LaptopConfig hands the site to the container.
	LaptopConfig = `listeners:
  - name: web
    listen: ["tailnet:8080"]
    mode: http
    accept_proxy: { from: ["tag:home"] }
    routes:
      - { host: [` + siteName + `], forward: "docker://blog:8080" }
`
	siteName = "example.vsq.cz"
)
