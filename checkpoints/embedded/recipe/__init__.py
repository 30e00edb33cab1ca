"""The recipe of the embedded prior: every command that made the shipped weights, in order.

    python -m tiltopt.embedded.recipe.glyphs      # font -> glyphs
    python -m tiltopt.embedded.recipe.compose     # glyphs -> captioned 64 px pictures
    python -m tiltopt.embedded.recipe.tokenizer   # captions -> byte-level BPE
    python -m tiltopt.embedded.recipe.clip        # pictures + captions -> CLIPModel
    python -m tiltopt.embedded.recipe.vae         # pictures -> AutoencoderTiny
    python -m tiltopt.embedded.recipe.latents     # pictures -> latents, captions -> text states
    python -m tiltopt.embedded.recipe.unet        # latents -> UNet2DConditionModel
    python -m tiltopt.embedded.recipe.judge       # pictures -> the independent judge
    python -m tiltopt.embedded.recipe.assemble    # all parts -> pipeline/, clip/, judge/
    python -m tiltopt.embedded.recipe.measure     # the numbers of the model card

Each takes `--work`, the folder for working files, and picks up where it was stopped.
"""
