"""The tiny models of every family, by name."""

import importlib
import pkgutil

import zoo

SPECIMENS = {
    specimen.name: specimen
    for module in pkgutil.iter_modules(zoo.__path__)
    for specimen in getattr(importlib.import_module(f"zoo.{module.name}"), "SPECIMENS", [])
}
