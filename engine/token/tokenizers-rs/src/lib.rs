//! One static library: daulet's C functions over a guarded tokenizer, and ours (`nngtok_*`).

mod guard;
mod nng;

/// daulet/tokenizers' source, byte for byte as the Go module ships it.
///
/// It says `use tokenizers::tokenizer::Tokenizer`, which finds the module below first: the same
/// names, but every call that could panic on a hostile file comes back as an error.
#[allow(dead_code, unused, non_camel_case_types, clippy::all)]
mod daulet {
    mod tokenizers {
        pub mod tokenizer {
            pub use crate::guard::Tokenizer;
            pub use hf::tokenizer::{TruncationDirection, TruncationParams};
        }
    }
    include!("daulet.rs");
}

pub(crate) use daulet::UnifiedTokenizer;
