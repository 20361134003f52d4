"""The zoo: small models of very different structure, on which the whole way from masks to ONNX Runtime is tested.

A model is made by ``ZOO[name].make()``; torchvision, timm and transformers are imported only then.
"""

from zoo import hard_cases, timm_models, torchvision_models, transformers_models
from zoo.entry import Entry

ZOO: dict[str, Entry] = {
    entry.name: entry
    for module in (torchvision_models, timm_models, transformers_models, hard_cases)
    for entry in module.ENTRIES
}
