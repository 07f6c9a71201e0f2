from .callback import *
from .config import *
from .gptq import *
from .layer import *
from .model import *
