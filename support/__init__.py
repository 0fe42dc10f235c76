"""What every program of this kind needs, and no reader of the method came for."""
from support.files import load_saes
from support.models import load_model
