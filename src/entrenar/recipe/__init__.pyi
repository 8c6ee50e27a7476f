from entrenar.recipe.finetune import FinetuneReport, finetune, resumable_finetune_config
from entrenar.recipe.finetune_figures import Figures
from entrenar.recipe.finetune_rows import question_of
from entrenar.recipe.models import evaluate_model, model_folder, open_model, write_model_folder
from entrenar.recipe.pretrain import TrainReport, check, open_corpora, resumable_config, train
from entrenar.recipe.start import Observer, choose_device

__all__ = [
    "Figures",
    "FinetuneReport",
    "Observer",
    "TrainReport",
    "check",
    "choose_device",
    "evaluate_model",
    "finetune",
    "model_folder",
    "open_corpora",
    "open_model",
    "question_of",
    "resumable_config",
    "resumable_finetune_config",
    "train",
    "write_model_folder",
]
