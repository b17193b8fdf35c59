//! Hashes of pages and blocks. They find mistakes; they are no defence.

use rapidhash::v3::{DEFAULT_RAPID_SECRETS, rapidhash_v3_seeded};

use crate::memory::PAGE;

/// The hash of bytes at this place of what they are part of. The same bytes elsewhere have another one, and so have fewer
/// or more zeros.
pub(crate) fn of(bytes: &[u8], place: usize) -> u64 {
    let factor = factor(place);
    rapidhash_v3_seeded(bytes, &DEFAULT_RAPID_SECRETS).wrapping_mul(factor).wrapping_add(factor)
}

/// No two places have the same one, and it is odd: multiplying loses nothing.
fn factor(place: usize) -> u64 {
    (place as u64).wrapping_mul(2).wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15)
}

/// The hash of a page at this place: 0 for one of zeros, wherever it is.
pub(crate) fn of_page(bytes: &[u8], place: usize) -> u64 {
    const ZEROS: u64 = rapidhash_v3_seeded(&[0; PAGE], &DEFAULT_RAPID_SECRETS);
    rapidhash_v3_seeded(bytes, &DEFAULT_RAPID_SECRETS).wrapping_sub(ZEROS).wrapping_mul(factor(place))
}

/// Whether there is nothing but zeros.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks::<64>();
    words.iter().all(|w| w.iter().fold(0, |all, b| all | b) == 0) && rest.iter().all(|b| *b == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn place_length_and_content_count() {
        let zeros = [0; 4096];
        let mut all = vec![of(&zeros, 0), of(&zeros, 1), of(&zeros, 2), of(&zeros[1..], 0), of(&[], 0)];
        for at in [0, 63, 64, 4095] {
            let mut one = zeros;
            one[at] = 1;
            assert!(!is_zero(&one) && is_zero(&zeros[..at]) && is_zero(&zeros));
            all.push(of(&one, 0));
        }
        let (pages, mut page) = ([0; PAGE], [0; PAGE]);
        assert_eq!((of_page(&pages, 0), of_page(&pages, 9)), (0, 0));
        page[PAGE - 1] = 1;
        all.extend([of_page(&page, 0), of_page(&page, 1)]);
        let count = all.len();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), count);
    }

    #[test]
    fn it_is_the_same_in_every_release() {
        // Both kernels of a morph have to have the same one.
        assert_eq!(
            (of(b"kmorph", 0), of(b"kmorph", 7)),
            (11_698_658_822_775_686_570, 9_459_185_678_249_334_006)
        );
    }
}
