"""The server's own store of model weights: immutable, and every distinct tensor once.

A mapped file that somebody shortens kills the process, and one that is overwritten changes loaded
models. So models are served from copies that nobody else writes to. The copies are made by content:
fifty fine-tunes of one encoder are one encoder and fifty heads, on the disk and, mapped, in memory.

    packs/<digest>.safetensors  the tensors; their names are their identities
    models/<digest>/            a model's small files, and weights.json: where its tensors are
    index/<digest>.json         which model a folder was when it was last looked at
    tmp/                        what is being written; whatever lies there otherwise is swept away
    servers/<name>              what a running server has registered
    unused.json                 since when nobody uses what is there
    store.json                  the number of this format
    *.lock                      see locks

Nothing is changed once it has its name. A pack gets its name before a model that needs it, a model
before an index entry that says it. So a server that dies leaves at worst tensors that no model
needs yet, and the next import finds them.

    facade      WeightStore: take, collect, verify
    collecting  Collector: gives back what nobody uses
    layout      the folder, and how files get into it
    locks       who may write, and who may remove
    sources     model folders as they are found, and whether they changed
    contents    what a model is made of, by content
    packs       writing and finding tensors
    manifest    weights.json
    index       index/
    flights     one import of a folder at a time
"""

from modelyard_server.weights.store.collecting import Collected, Collector
from modelyard_server.weights.store.facade import StoreUsage, WeightStore, in_place
from modelyard_server.weights.store.layout import StoreError

__all__ = ["Collected", "Collector", "StoreError", "StoreUsage", "WeightStore", "in_place"]
