//! The setters that several losses have, each written once together with its documentation.
//!
//! A loss gives its name, the lines that make the inputs of its examples, the arguments of a call with them, the path
//! of its options, and of its gradients the one to look at if there are several. The class indices' losses choose
//! inputs whose logits are `[[1, 2, 3], [1, 2, 0]]`, so that an option has the same effect in the examples of each; the
//! other losses give the numbers too.

/// An example in a doc comment: the inputs, and the lines that are given.
macro_rules! example {
    ($loss:literal, $inputs:literal, $($line:expr),+ $(,)?) => {
        concat!(
            "```\n# use candle_core::{Device, Tensor};\n# use candle_fused_loss::{Reduction, ", $loss, "};\n",
            $inputs, "\n", $($line, "\n",)+
            "# candle_core::Result::Ok(())\n```"
        )
    };
}

/// An example in which a setter changes the loss to `$value`.
macro_rules! setter_example {
    ($loss:literal, $inputs:literal, $args:literal, $setter:literal, $value:literal $(, $line:literal)?) => {
        example!(
            $loss, $inputs, $($line,)?
            concat!("let loss = ", $loss, "::new()", $setter, ".forward", $args, "?;"),
            concat!("assert!((loss.to_scalar::<f32>()? - ", $value, ").abs() < 1e-6);"),
        )
    };
}

/// The setters of every loss. `$of` says whose losses are reduced; `$mean` and `$sum` are the losses of the inputs.
macro_rules! loss_setters {
    (
        loss: $loss:literal, inputs: $inputs:literal, args: $args:literal, options: self.$($options:ident).+,
        of: $of:literal, mean: $mean:literal, sum: $sum:literal, normalized: $normalized:literal
        $(, grad: $grad:literal)? $(,)?
    ) => {
        #[doc = concat!("Sets what becomes of the ", $of, "' losses; by default their mean is returned.")]
        ///
        #[doc = setter_example!($loss, $inputs, $args, ".with_reduction(Reduction::Sum)", $sum)]
        pub fn with_reduction(mut self, reduction: Reduction) -> Self {
            self.$($options).+.reduction = reduction;
            self
        }

        /// Chooses between this crate's kernels (`true`, the default) and a composition of candle's tensor ops
        /// (`false`).
        ///
        /// The composition returns the same values up to rounding, but is slower and needs more memory: see
        /// [`unfused`](crate::unfused).
        ///
        #[doc = setter_example!($loss, $inputs, $args, ".with_fused(false)", $mean)]
        pub fn with_fused(mut self, fused: bool) -> Self {
            self.$($options).+.fused = fused;
            self
        }

        /// Makes [`Reduction::Mean`](crate::Reduction::Mean) divide the sum by this positive number, or by this scalar
        /// tensor, instead of its usual denominator: by the [`count`](Self::count) of all devices, say, or of all the
        /// batches whose gradients are accumulated. Another reduction is an error then.
        ///
        #[doc = setter_example!($loss, $inputs, $args, ".with_normalizer(4.0)", $normalized)]
        pub fn with_normalizer(mut self, normalizer: impl Into<Normalizer>) -> Self {
            self.$($options).+.normalizer = Some(normalizer.into());
            self
        }

        /// Multiplies the gradients of [`loss_and_grad`](Self::loss_and_grad), not the loss, by a finite number, in the
        /// arithmetic dtype and ahead of their one rounding; 1 by default.
        ///
        /// The mean's gradient of many rows underflows in f16: what would be a loss scale in front of a backward is
        /// this number here. The optimizer divides by it.
        ///
        #[doc = example!(
            $loss, $inputs,
            concat!("let of = |scale| ", $loss, "::new().with_grad_scale(scale).loss_and_grad", $args, ";"),
            "let (plain, scaled) = (of(1.0)?, of(1024.0)?);",
            concat!("let numbers = |grad: &Tensor| grad.flatten_all()?.to_vec1::<f32>();"),
            concat!("assert_eq!(numbers(&(&plain.1", $($grad,)? " * 1024.0)?)?, numbers(&scaled.1", $($grad,)? ")?);"),
        )]
        pub fn with_grad_scale(mut self, scale: f64) -> Self {
            self.$($options).+.grad_scale = scale;
            self
        }
    };
}

/// The setters of the losses of rows with class indices.
#[rustfmt::skip] // which would indent the examples anew each time
macro_rules! row_setters {
    (loss: $loss:literal, inputs: $inputs:literal, args: $args:literal, options: self.$($options:ident).+
    $(, grad: $grad:literal)? $(,)?) => {
        /// Sets class weights, one for each class: shape `(C)`, any float dtype. They are constants: no gradient flows
        /// into them.
        ///
        #[doc = setter_example!(
            $loss, $inputs, $args, ".with_weight(class_weights)", "0.4460675",
            "let class_weights = Tensor::new(&[0.2f32, 1., 5.], &Device::Cpu)?;"
        )]
        pub fn with_weight(mut self, weight: Tensor) -> Self {
            self.$($options).+.weight = Some(weight);
            self
        }

        /// Sets a factor of each row's loss, all of its terms included: any float dtype, or u8 for a mask, in which 0
        /// is a weight of 0 and anything else one of 1. Its shape may be any that broadcasts to the class indices'. The
        /// mean divides by the sum of these weights times the classes' weights.
        ///
        /// A row of weight 0 is left out as an ignored one is: its loss and gradient are 0 whatever logits and target
        /// hold there. The weights are constants: no gradient flows into them.
        ///
        #[doc = setter_example!(
            $loss, $inputs, $args, ".with_row_weight(row_weights)", "0.657606",
            "let row_weights = Tensor::new(&[3f32, 1.], &Device::Cpu)?;"
        )]
        pub fn with_row_weight(mut self, row_weight: Tensor) -> Self {
            self.$($options).+.row_weight = Some(row_weight);
            self
        }

        /// Sets the class index whose rows are left out: their loss and gradient are 0, and the mean does not count
        /// them. It is -100 by default.
        ///
        /// Any value is legal, a class too, since rows are compared with it before their indices are checked.
        ///
        #[doc = setter_example!($loss, $inputs, $args, ".with_ignore_index(0)", "0.407606")]
        pub fn with_ignore_index(mut self, ignore_index: i64) -> Self {
            self.$($options).+.ignore_index = ignore_index;
            self
        }

        /// Sets the axis of the classes, negative from the end; by default it is 1, or 0 where there is no batch. The
        /// loss and the gradient are as if it were moved to axis 1: with -1, logits `(N, d1, …, dk, C)` go with a
        /// target `(N, d1, …, dk)`. The logits of linear cross-entropy have them last, and nowhere else.
        ///
        #[doc = setter_example!($loss, $inputs, $args, ".with_class_axis(-1)", "0.907606")]
        pub fn with_class_axis(mut self, axis: isize) -> Self {
            self.$($options).+.class_axis = Some(axis);
            self
        }

        /// On CUDA, makes a class index out of range an error, at the price of a synchronisation. Off by default: the
        /// index's row is NaN instead. The CPU always checks.
        ///
        #[doc = example!(
            $loss, $inputs,
            "let target = Tensor::new(&[2u32, 3], &Device::Cpu)?; // there is no class 3",
            concat!("let error = ", $loss, "::new().with_target_check(true).forward", $args, ".unwrap_err();"),
            "assert!(error.to_string().contains(\"target 3 at row 1\"));",
        )]
        pub fn with_target_check(mut self, check: bool) -> Self {
            self.$($options).+.target_check = check;
            self
        }

        /// What [`Reduction::Mean`](crate::Reduction::Mean) divides by for rows with these targets, a scalar f64 on
        /// their device, for which nobody waits: the weights of the rows that count, without weights their number; or
        /// the normalizer, if there is one. The counts of several batches or devices, added up, are the normalizer of
        /// each.
        ///
        /// # Errors
        /// Tensors whose shapes, dtypes or devices don't fit, a normalizer out of range, and on the CPU a class index
        /// that is negative or, with class weights, has none.
        ///
        #[doc = example!(
            $loss, $inputs,
            concat!("let loss = ", $loss, "::new().with_ignore_index(0);"),
            "assert_eq!(loss.count(&target)?.to_scalar::<f64>()?, 1.0);",
        )]
        pub fn count(&self, target: &Tensor) -> Result<Tensor> {
            crate::composed::count_rows(NAME, &self.$($options).+, target)
        }

        loss_setters! {
            loss: $loss, inputs: $inputs, args: $args, options: self.$($options).+,
            of: "rows", mean: "0.907606", sum: "1.815212", normalized: "0.453803" $(, grad: $grad)?,
        }
    };
}

/// The setters of the softmax family, those of rows included.
macro_rules! softmax_setters {
    (loss: $loss:literal, inputs: $inputs:literal, args: $args:literal, options: self.$($options:ident).+
    $(, grad: $grad:literal)? $(,)?) => {
        row_setters! { loss: $loss, inputs: $inputs, args: $args, options: self.$($options).+.rows $(, grad: $grad)? }

        /// Sets the label smoothing, a number in [0, 1]; 0 by default.
        ///
        #[doc = setter_example!($loss, $inputs, $args, ".with_label_smoothing(0.1)", "0.957606")]
        pub fn with_label_smoothing(mut self, label_smoothing: f64) -> Self {
            self.$($options).+.label_smoothing = label_smoothing;
            self
        }

        /// Adds `z (log sum_c exp(x_c))^2` to the loss of each row that is not ignored, whatever its weight. z is 0 or
        /// more, and 0 by default.
        ///
        #[doc = setter_example!($loss, $inputs, $args, ".with_z_loss(0.01)", "0.994648")]
        pub fn with_z_loss(mut self, z: f64) -> Self {
            self.$($options).+.z_loss = z;
            self
        }

        /// Replaces the logits, once they are scaled, by `cap tanh(x / cap)`. The cap is positive; by default there is
        /// none.
        ///
        #[doc = setter_example!($loss, $inputs, $args, ".with_softcap(2.0)", "0.969912")]
        pub fn with_softcap(mut self, cap: f64) -> Self {
            self.$($options).+.softcap = Some(cap);
            self
        }

        /// Replaces the negative log-likelihood of a row's own class by a function of it: softmax focal loss, poly-1,
        /// and others. Class weights and 1 - smoothing are factors of the result; the terms of smoothing and z-loss
        /// stay as they are. It is for class indices.
        ///
        #[doc = setter_example!(
            $loss, $inputs, $args, ".with_row_transform(focal)", "0.424313",
            "let focal = candle_fused_loss::RowTransform::Focal { gamma: 2.0 };"
        )]
        pub fn with_row_transform(mut self, transform: RowTransform) -> Self {
            self.$($options).+.row_transform = Some(transform);
            self
        }

        /// Multiplies the logits by this number before anything else: the inverse of a temperature, 1 by default.
        ///
        /// A number of 0 makes all classes equally probable, one below 0 the lowest logit the most probable. A row with
        /// a logit of -inf has no softmax then, and is NaN.
        ///
        #[doc = setter_example!($loss, $inputs, $args, ".with_logit_scale(2.0)", "1.142932")]
        pub fn with_logit_scale(mut self, scale: f64) -> Self {
            self.$($options).+.logit_scale = scale;
            self
        }
    };
}

/// The setter of element-wise masks, and the number of what counts. `$left` says how an element is left out of the
/// losses, `$counted` what the mean divides by. The example's mask leaves a loss of `$masked`, and a count of 1.
#[rustfmt::skip] // which would indent the examples anew each time
macro_rules! element_mask_setter {
    (
        loss: $loss:literal, inputs: $inputs:literal, args: $args:literal, options: self.$options:ident,
        left: $left:literal, mask: $mask:literal, masked: $masked:literal,
        counted: $counted:literal, count: $count:ident($name:expr) $(,)?
    ) => {
        /// Sets a mask: an element counts where it is 1, or anything else but 0. Where it is 0, the element is left
        /// out: what input, target and weights hold there is not looked at, its gradient is 0,
        #[doc = concat!($left, ".")]
        /// To leave out a label of 255, say, the mask is `target.ne(255)?`.
        ///
        /// Its dtype may be any that a target's may be, and its shape any that broadcasts to the target's.
        ///
        #[doc = setter_example!($loss, $inputs, $args, ".with_mask(mask)", $masked, $mask)]
        pub fn with_mask(mut self, mask: Tensor) -> Self {
            self.$options.mask = Some(mask);
            self
        }

        /// What [`Reduction::Mean`](crate::Reduction::Mean) divides by with this target, a scalar f64 on its device,
        /// for which nobody waits:
        #[doc = concat!($counted, ";")]
        /// or the normalizer, if there is one. The counts of several batches or devices, added up, are the normalizer
        /// of each.
        ///
        /// # Errors
        /// Tensors whose shapes, dtypes or devices don't fit, and a normalizer out of range.
        ///
        #[doc = example!(
            $loss, $inputs, $mask,
            concat!("let loss = ", $loss, "::new().with_mask(mask);"),
            "assert_eq!(loss.count(&target)?.to_scalar::<f64>()?, 1.0);",
        )]
        pub fn count(&self, target: &Tensor) -> Result<Tensor> {
            self.$options.$count($name, target)
        }
    };
}

/// The setter of the check of values on CUDA; `$refused` makes a target whose element 1 is 255.
#[rustfmt::skip] // which would indent the examples anew each time
macro_rules! element_check_setter {
    (
        loss: $loss:literal, inputs: $inputs:literal, args: $args:literal, options: self.$options:ident,
        values: $values:literal, refused: $refused:literal $(,)?
    ) => {
        #[doc = concat!("On CUDA, makes ", $values, " an error, at the price of a synchronisation.")]
        /// Off by default: the element is NaN instead. The CPU always checks.
        ///
        #[doc = example!(
            $loss, $inputs, $refused,
            concat!("let error = ", $loss, "::new().with_target_check(true).forward", $args, ".unwrap_err();"),
            "assert!(error.to_string().contains(\"target 255 at element 1\"));",
        )]
        pub fn with_target_check(mut self, check: bool) -> Self {
            self.$options.target_check = check;
            self
        }
    };
}

/// The setter of element-wise weights; `$weighted` is the loss of the inputs with weights 0.5 and 2.
#[rustfmt::skip] // which would indent the examples anew each time
macro_rules! element_weight_setter {
    (
        loss: $loss:literal, inputs: $inputs:literal, args: $args:literal, options: self.$options:ident,
        weighted: $weighted:literal $(,)?
    ) => {
        /// Sets a factor of each element's loss: any float dtype, and any shape that broadcasts to the target's. It is
        /// a constant: no gradient flows into it. Where it is 0, loss and gradient are 0 whatever input and target
        /// hold; but the mean counts the element: what is to be left out needs a [mask](Self::with_mask).
        ///
        #[doc = setter_example!(
            $loss, $inputs, $args, ".with_weight(weight)", $weighted,
            "let weight = Tensor::new(&[0.5f32, 2.], &Device::Cpu)?;"
        )]
        pub fn with_weight(mut self, weight: Tensor) -> Self {
            self.$options.weight = Some(weight);
            self
        }
    };
}
