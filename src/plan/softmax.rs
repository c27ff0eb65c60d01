//! Launch plans of the softmax family.
