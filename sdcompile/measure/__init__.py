"""Measuring: how fast bundles are, how good their pictures are, which of several is worth having.

    bench       seconds, memory and energy, alternated between contenders
    evaluate    pictures against prompts and against the fp32 reference
    experiment  a list of recipes or overlays, each built, benched and evaluated in one run
    report      one HTML page of it

It stands above the builder and the runtime and uses both as a user would. A contender runs in a
process of its own (`worker`), so that figures of memory and of cold starts are its own.
"""

from __future__ import annotations
