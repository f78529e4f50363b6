"""Changes the forward of networks in place, and back: the weights and their names stay the same.

`swap_classes` gives modules a subclass of their class, with another forward; `swap_methods` gives a single module other
methods. Neither depends on the other, so that both can be undone in any order.
"""

from collections.abc import Callable, Mapping
from typing import TypeVar

from torch import nn

Network = TypeVar("Network", bound=nn.Module)

SWAPPED = "_swapped"  # attribute of a swapped module: its own class, and the names of attributes that were attached


def swap_class(module: nn.Module, replacement: type[nn.Module]) -> None:
    """Give a module a subclass of its class."""
    module.__dict__[SWAPPED] = type(module), []
    module.__class__ = replacement


def attach(module: nn.Module, **attributes: object) -> None:
    """Give a swapped module attributes for its new forward, until its class is restored."""
    module.__dict__[SWAPPED][1].extend(attributes)
    module.__dict__.update(attributes)


def swap_classes(network: Network, replacements: Mapping[type[nn.Module], type[nn.Module]]) -> Network:
    """Swap the class of every module that the table names; subclasses are left alone. Returns the same network."""
    for module in network.modules():
        if type(module) in replacements:
            swap_class(module, replacements[type(module)])
    return network


def restore_classes(network: Network) -> Network:
    """Undo `swap_class`, `swap_classes` and `attach` in all modules. Returns the same network."""
    for module in network.modules():
        module.__class__, attached = module.__dict__.pop(SWAPPED, (type(module), ()))
        for name in attached:
            del module.__dict__[name]
    return network


def swap_methods(module: nn.Module, **methods: Callable) -> None:
    """Give one module other methods than its class has."""
    module.__dict__.update(methods)


def restore_methods(module: nn.Module, *names: str) -> None:
    """Undo `swap_methods`; nothing where they are the class's own."""
    for name in names:
        module.__dict__.pop(name, None)


def has_swapped(module: nn.Module, name: str) -> bool:
    """Whether a method of this module is another than its class's."""
    return name in module.__dict__
