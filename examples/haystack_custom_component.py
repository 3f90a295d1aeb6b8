"""Haystack's page on devices, third example: a component of one's own that takes a device.

What loads the model is modelyard's, the import statements are some, and the class is made a
component and has the ``run`` that every component must have; all else is as the page has it. A
device of None, which the page's ``from_dict`` cannot read, can be read here.

It needs a server with the devices ``cpu``, ``cuda:0`` and ``disk``, ``cuda:1`` as well (logical
ones will do), and a folder ``bert-base-cased-squad2`` with a BERT below its root ``store``.

    MODELYARD_SERVER=127.0.0.1:8470 python examples/haystack_custom_component.py
"""

import os
from typing import Any

from haystack import component, default_from_dict, default_to_dict
from haystack.utils import ComponentDevice, Device, DeviceMap

from modelyard import Admin
from modelyard.integrations.haystack import ModelyardTextEmbedder


@component
class MyComponent:
    """Embeds a text, on a device that can be chosen."""

    def __init__(self, device: ComponentDevice | None = None, key: str = "squad") -> None:
        # Without a device, whatever this machine has is taken.
        self.device: ComponentDevice | None = ComponentDevice.resolve_device(device)
        self.key = key
        self.model: ModelyardTextEmbedder | None = None

    def warm_up(self) -> None:
        """Register the model on the server, and load it there."""
        if self.model is None:
            # It takes the device as it is: what a framework calls it, the server knows.
            self.model = ModelyardTextEmbedder(
                self.key, model="bert-base-cased-squad2", device=self.device
            )
        self.model.warm_up()

    @component.output_types(embedding=list[float])
    def run(self, text: str) -> dict[str, Any]:
        """Embed a text."""
        self.warm_up()
        assert self.model is not None
        return {"embedding": self.model.run(text)["embedding"]}

    def close(self) -> None:
        """Close the connection."""
        if self.model is not None:
            self.model.close()

    def to_dict(self) -> dict[str, Any]:
        """The device is data like any other."""
        return default_to_dict(
            self, device=self.device.to_dict() if self.device else None, key=self.key
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "MyComponent":
        """The device becomes a value before the rest is read."""
        init_params = data["init_parameters"]
        if init_params["device"] is not None:
            init_params["device"] = ComponentDevice.from_dict(init_params["device"])
        return default_from_dict(cls, data)


# Whatever is there.
c = MyComponent(device=None)
print(c.device)

# The first GPU.
c = MyComponent(device=ComponentDevice.from_str("cuda:0"))
print(len(c.run("the big dog")["embedding"]))
c.close()

# The processor.
c = MyComponent(device=ComponentDevice.from_single(Device.cpu()))

# Several devices.
c = MyComponent(
    device=ComponentDevice.from_multiple(
        DeviceMap({"layer1": Device.cpu(), "layer2": Device.gpu(1), "layer3": Device.disk()})
    )
)
print(MyComponent.from_dict(c.to_dict()).device == c.device)

# The page's map is of an imaginary model; this one is of the one that is there.
c = MyComponent(
    key="squad-in-parts",
    device=ComponentDevice.from_multiple(
        DeviceMap(
            {
                "embeddings": Device.cpu(),
                "encoder": Device.gpu(1),
                "encoder.layer.1": Device.disk(),
            }
        )
    ),
)
print(len(c.run("the big dog")["embedding"]))
c.close()

with Admin(os.environ.get("MODELYARD_SERVER", "127.0.0.1:8470")) as admin:
    for model in ("squad", "squad-in-parts"):
        admin.delete_model(model)
