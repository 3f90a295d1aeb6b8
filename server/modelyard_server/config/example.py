"""The configuration that the documentation and the command line show."""

from __future__ import annotations

__all__ = ["default_config_text"]


def default_config_text() -> str:
    """Return a commented configuration with every setting at its default.

    It can be read from any folder, because its one root is the folder it lies in. Serving its
    model needs the files of one in the folder ``sentiment`` beside it.
    """
    return _EXAMPLE


_EXAMPLE = """\
# modelyard, with every setting. What has a default is shown with it and may be left out.
# Sizes: bytes (300000000) or text with a unit ("300MB" = 10^6 bytes, "300MiB" = 2^20 bytes).

[server]
listen = "127.0.0.1:8470"        # host:port; port 0 lets the system choose
insecure_non_loopback = false    # there is no TLS yet: true lets other machines in unprotected
default_deadline_s = 30          # for requests that bring no deadline
max_deadline_s = 300             # longer deadlines are shortened to this
max_message_bytes = "16MiB"      # largest request
shutdown_grace_s = 10            # for running requests after SIGTERM
log_level = "info"               # debug, info, warning or error

[http]                           # the same without gRPC: JSON, Connect and gRPC-Web
listen = ""                      # host:port, such as "127.0.0.1:8081"; "" is off
insecure_non_loopback = false    # as in [server]
origins = []                     # web pages whose scripts may call: "https://example.com"

[yard]
policy = "ensemble"              # how victims are chosen: see docs/eviction.md for the others
order = "urgency"                # who is next; "fifo": strictly who came first, at any price
max_waiting_per_model = 1024     # requests; one more is refused with QUEUE_FULL
max_waiting = 65536              # the same for all models together
overdue_after_s = 30             # who waits longer may make models in use give way
backoff_initial_s = 1            # rest after a failed load, doubled with each failure
backoff_max_s = 60
loads_per_device = 1             # loads at once
explain_capacity = 4096          # decisions remembered

[catalog]                        # models, keys and plans that come over the wire
file = "modelyard.db"            # relative to this file
durable = true                   # false: in memory, gone when the server stops

[weights]                        # what models are made of
store = "modelyard-store"        # the server's own copies; relative to this file
in_place = false                 # true: no copies, files are read where they lie
read = "map"                     # into host memory: map, owned or arena
arena = 0                        # what an arena keeps for the next model, such as "1GiB"
keep_unused_s = 86400            # how long the store keeps what nobody uses any more

[engine]                         # where models run
kind = "process"                 # in worker processes; or "thread", in the server's own
run_limit_s = 60                 # a run that takes longer hangs: its worker is ended
load_limit_s = 900               # the same for a load
headroom = "2GiB"                # what a worker may allocate beside its devices' budgets
strikes = 3                      # workers a model may bring down in ten minutes
max_batch_rows = 64              # that requests share a run with; 1: each has its own
max_batch_bytes = "64MiB"        # of such a run's inputs, with padding

[host_tier]                      # keeps copies of models that were evicted from accelerators
budget = 0                       # of host memory, such as "4GiB" or "25%"; 0: no copies

[[devices]]                      # one block for each device, at most 16
device = "cpu"                   # cpu, cuda:0, xpu:0, mps, disk
budget = "50%"                   # of what the device has; or a size such as "300MB"
reserve = 0                      # what budgets leave alone, such as "2GiB"
logical = false                  # true: a pool of host memory that stands for the device
threads = 1                      # of one batch that runs on it
transfer_bandwidth = 0           # of a logical device, such as "4GiB/s"; 0: no limit
worker = "models"                # the worker process; a model in parts must be in one

[roots]                          # folders below which models may be; nothing else is ever opened
store = "."                      # this file's folder; absolute, or relative to this file

[runtimes.torch]
allowed_factories = []           # what may build modules, e.g. ["my_package.nets:make_net"]

[models.sentiment]               # its id, which is a key, too
keys = ["acme/sentiment"]        # further keys
runtime = "transformers"         # or "torch", "identity"
task = "text-classification"     # transformers only
root = "store"
folder = "sentiment"             # below the root
device = "cpu"                   # or "auto", "balanced", "sequential", or a table of parts
pinned = false                   # true: loaded at the start, never evicted

[models.sentiment.options]       # what the runtime is told

[models.echo]                    # answers with its input; needs no weights
runtime = "identity"

[[routes]]                       # keys that can be given another meaning: see docs/routes.md
id = "greetings"                 # its name; no key
keys = ["acme/greet", "hello"]   # a key is in one route, or a model's own
prefixes = []                    # such as "acme/": keys that begin so and have no other meaning
model = "echo"                   # what they mean: one of [models], or a table of another kind

[[routes]]
id = "trial"
keys = ["acme/trial"]

[routes.split]                   # or sequence, ensemble, shadow, fallback, versions
branches = [
  {name = "old", target = "models/echo", weight = 90},
  {name = "new", target = "routes/greetings", weight = 10},
]
"""
