from .callback import AdaLoraCallback as AdaLoraCallback
from .config import AdaLoraConfig as AdaLoraConfig
from .gptq import SVDQuantLinear as SVDQuantLinear
from .layer import (
    AdaLoraLayer as AdaLoraLayer,
)
from .layer import (
    RankAllocator as RankAllocator,
)
from .layer import (
    SVDConv2d as SVDConv2d,
)
from .layer import (
    SVDLinear as SVDLinear,
)
from .model import AdaLoraModel as AdaLoraModel
