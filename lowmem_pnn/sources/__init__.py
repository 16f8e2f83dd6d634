"""Where models and data sets come from: names, files and factories turned into constructors and indexed samples."""
