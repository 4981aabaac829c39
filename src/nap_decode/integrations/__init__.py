"""Our samplers behind the interfaces that others' harnesses call: LLaDA's, Dream's, dLLM's and transformers'.

Each module builds a :class:`~nap_decode.Denoiser` and a :class:`~nap_decode.Sampler`, and translates
arguments and results; none of them decodes.  None is imported with the package, and none imports what it stands in for.
"""
