"""Stands for a package that a client imports but never uses in the runs here.

A copy of this file becomes the package's __init__.py in the client's environment. Every name in the
package, and every module below it, is there, as a class without methods.
"""

import importlib.abc
import importlib.machinery
import sys
import types


def _placeholder(_, name):
    if name.startswith("__"):
        raise AttributeError(name)
    return _Meta(name, (), {})


class _Meta(type):
    __getattr__ = _placeholder


class _Module(types.ModuleType):
    __getattr__ = _placeholder


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.startswith(f"{__name__}."):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Module(spec.name)

    def exec_module(self, module):
        pass


sys.meta_path.append(_Finder())
sys.modules[__name__].__class__ = _Module
