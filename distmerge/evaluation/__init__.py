"""The room of `evaluate`: a merged model as a language model, against the unmerged one that it was made from."""
