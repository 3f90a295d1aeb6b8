"""Haystack's page on devices, first example: a generator on one device.

The component is modelyard's, and the import statement is one; all else is as the page has it. The
device is one of the server's. It needs a server with a device ``cuda:1`` (a logical one will do)
and a folder ``llama2`` below its root ``store``, for instance::

    [roots]
    store = "models"

    [[devices]]
    device = "cuda:1"
    budget = "1GiB"
    logical = true

    MODELYARD_SERVER=127.0.0.1:8470 python examples/haystack_single_device.py
"""

import os

from haystack.utils import ComponentDevice, Device

from modelyard import Admin
from modelyard.integrations.haystack import ModelyardGenerator

device = ComponentDevice.from_single(Device.gpu(id=1))
# The same in torch's words.
device = ComponentDevice.from_str("cuda:1")
generator = ModelyardGenerator(model="llama2", device=device)

# Here the page ends. Warming up registers the model and loads it onto the device.
generator.warm_up()
answer = generator.run("the big dog", generation_kwargs={"max_new_tokens": 5})
print(answer["replies"][0])
print(answer["meta"][0]["device"])
generator.close()

# The model stays registered. Take it away again: the next example wants it somewhere else.
with Admin(os.environ.get("MODELYARD_SERVER", "127.0.0.1:8470")) as admin:
    admin.delete_model("llama2")
