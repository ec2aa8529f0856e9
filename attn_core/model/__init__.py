"""Layers and models without a framework: configs, the naming of weights, files, positions, seeds.

The decisions live here, once, and the layers of torch, Keras and flax only speak them in their
framework's words:

    config        AttentionConfig: sizes and rules of one attention layer
    additive      AdditiveConfig: the same of additive attention
    transformer   TransformerConfig: the same of a whole model
    parameters    the plan: every parameter's name, shape and kind
    initial       its first value, a function of (seed, name)
    weights       files: safetensors with a versioned naming scheme
    rules         masks and scores that a config stands for, with those of a call
    positions     rotary and sinusoidal angles, exact at any position
    seeds         one seed a step, a stream for each place that drops
    cache         keys and values that are kept, and the arithmetic of filling them
    calls         what a call of a layer must be
    build         the layer of the framework that a config or the flag names
"""
