"""The one part of the build that pyproject.toml has no stable words for: the C extension."""

import os

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "mtetool._loops",
            ["mtetool/_loops.c"],
            py_limited_api=True,
            extra_compile_args=["-O3"],
            # Without a compiler mtetool installs all the same, and runs on numpy; a package that
            # is built for others must not.
            optional=not os.environ.get("MTETOOL_REQUIRE_LOOPS"),
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
