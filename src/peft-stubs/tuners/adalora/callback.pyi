from transformers import TrainerCallback

class AdaLoraCallback(TrainerCallback):
    def __init__(self) -> None: ...
