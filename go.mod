module github.com/nnsight-go/nnsight-go

go 1.26

require (
	github.com/daulet/tokenizers v1.24.0
	github.com/stretchr/testify v1.11.1
	github.com/tinylib/msgp v1.6.5
	github.com/wangkuiyi/gotorch v0.0.0-20201028015551-9afed2f3ad7b
)

require (
	github.com/davecgh/go-spew v1.1.1 // indirect
	github.com/philhofer/fwd v1.2.0 // indirect
	github.com/pmezard/go-difflib v1.0.0 // indirect
	gopkg.in/yaml.v3 v3.0.1 // indirect
)
