"""Haystack's page on devices, second example: one model in parts on several devices.

The component is modelyard's, and the import statement is one; all else is as the page has it. The
page's map has the parts of an imaginary model. The server compares a map with the model's
parameters when the model is registered, so for a real one this map is refused, with the reasons;
behind it is one that fits. And the page's last example: a map by keyword arguments, which counts
more than the device.

It needs a server with the devices ``cpu``, ``cuda:0``, ``cuda:1`` (logical ones will do) and
``disk``, and a folder ``llama2`` below its root ``store`` (see haystack_single_device.py).

    MODELYARD_SERVER=127.0.0.1:8470 python examples/haystack_device_map.py
"""

import os

from haystack.utils import ComponentDevice, Device, DeviceMap

from modelyard import Admin, PlacementInvalid
from modelyard.integrations.haystack import ModelyardGenerator

device_map = DeviceMap(
    {
        "encoder.layer1": Device.gpu(id=0),
        "decoder.layer2": Device.gpu(id=1),
        "self_attention": Device.disk(),
        "lm_head": Device.cpu(),
    }
)
device = ComponentDevice.from_multiple(device_map)
generator = ModelyardGenerator(model="llama2", device=device)

# Here the page's example ends.
try:
    generator.warm_up()
except PlacementInvalid as refusal:
    print(refusal)

device_map = DeviceMap(
    {
        "model.embed_tokens": Device.gpu(id=0),
        "model.layers.0": Device.gpu(id=0),
        "model.layers.1": Device.gpu(id=1),
        "model.layers.1.self_attn": Device.disk(),
        "model.norm": Device.gpu(id=1),
        "lm_head": Device.cpu(),
    }
)
device = ComponentDevice.from_multiple(device_map)
generator = ModelyardGenerator("llama2-in-parts", model="llama2", device=device)
answer = generator.run("the big dog", generation_kwargs={"max_new_tokens": 5})
print(answer["replies"][0])
generator.close()

generator = ModelyardGenerator(
    "llama2-balanced", model="llama2", huggingface_pipeline_kwargs={"device_map": "balanced"}
)
answer = generator.run("the big dog", generation_kwargs={"max_new_tokens": 5})
print(answer["replies"][0])
generator.close()

with Admin(os.environ.get("MODELYARD_SERVER", "127.0.0.1:8470")) as admin:
    for model in ("llama2-in-parts", "llama2-balanced"):
        placed = admin.get_model(model).alternatives[0]
        print(model, *(part.device for part in placed.parts))
        admin.delete_model(model)
