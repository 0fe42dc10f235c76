"""What every program of this kind needs, and no reader came for."""
from support.files import load_saes
from support.models import load_model
