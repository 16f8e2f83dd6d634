"""What comes after training: samples that a trained model predicts, and the files that its answers go to."""
