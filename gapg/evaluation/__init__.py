"""What is done with a trained model: evaluate, calibrate, validate, report."""
