"""Parts of `train_pocket_model.py`: documentation in, a tiny question-answering model out."""
