module modelyard.dev/client

go 1.19
